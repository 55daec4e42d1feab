"use strict";
// One answer at a time is in the document. Whatever a model wrote becomes a text node, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const number = (value) => value.toLocaleString("en-US");
  const DROPPED = 0, SELECTED = 1;
  let current = null; // the answer that is shown, with its columns
  let listed = []; // indices into data.answers, as sorted and searched
  let here = -1; // the token that the details are of

  // ---- data ---------------------------------------------------------------------------------------------------------

  async function inflated(text) {
    const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  // The columns of an answer; entropy_fork/report/packed_answers.py: pack writes them.
  async function unpack(answer) {
    const buffer = await inflated(answer.data);
    const n = answer.tokens, { advantage, scores } = folderOf(answer);
    const words = (column) => new Uint32Array(buffer, column * 4 * n, n);
    const bytes = (column) => new Uint8Array(buffer, (advantage ? 20 : 16) * n + column * n, n);
    return {
      word: words(0), entropy: words(1), surprise: words(2), rank: words(3),
      advantage: advantage ? new Int32Array(buffer, 16 * n, n) : null,
      selected: bytes(0), firsts: scores.map((_, place) => bytes(1 + place)),
    };
  }

  // For each score of a pool its thresholds, and how many of the kept tokens the entropy keeps too; packed_answers.py: pack_pool writes them.
  async function tablesOf(pool) {
    if (!pool.tables) {
      const buffer = await inflated(pool.data), stops = data.ratios.length;
      const count = data.folders[pool.folder].scores.length;
      pool.tables = Array.from({ length: count }, (_, place) => {
        let sum = 0;
        const grown = new Int32Array(buffer, 4 * (count * (stops + 1) + place * stops), stops);
        return {
          threshold: new Float32Array(buffer, 4 * place * (stops + 1), stops + 1),
          shared: Array.from(grown, (value) => (sum += value)),
        };
      });
    }
    return pool.tables;
  }

  // ---- text ---------------------------------------------------------------------------------------------------------

  // What cannot be seen, or would change the order or the look of its surroundings, is named. analysis/plots.py: shown does so in tables.
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  function visible(text) {
    return text.replace(HIDDEN, (character) => {
      const code = character.codePointAt(0);
      if (code < 0x20) return String.fromCharCode(0x2400 + code);
      if (code === 0x7f) return "\u2421";
      return `\u2039U+${code.toString(16).toUpperCase().padStart(4, "0")}\u203a`;
    });
  }

  function fill(element, text) {
    const lines = visible(text).split("\n");
    element.replaceChildren();
    lines.forEach((line, index) => {
      if (index) {
        const mark = document.createElement("span");
        mark.className = "newline";
        element.append(mark, "\n");
      }
      if (line) element.append(line);
    });
  }

  const decimal = (units) => (units * data.unit).toFixed(4);
  const signed = (text) => text.replace("-", "\u2212");
  const unitOf = (score) => (score.unit ? ` ${score.unit}` : "");
  // The entropy has four digits behind the point. So have other nats, unless they are so small that nothing would be left.
  function amount(value, score) {
    const isFixed = score.unit === "nats" && (score.name === "entropy" || value === 0 || Math.abs(value) >= 0.001);
    return signed(isFixed ? value.toFixed(4) : String(Number(value.toPrecision(4))));
  }
  function percent(probability) {
    if (probability >= 0.99995) return ">99.99%";
    return probability >= 0.0001 ? `${(probability * 100).toPrecision(4)}%` : `${(probability * 100).toExponential(2)}%`;
  }

  // ---- the list of answers ------------------------------------------------------------------------------------------

  const poolOf = (answer) => data.pools[answer.pool];
  const folderOf = (answer) => data.folders[poolOf(answer).folder];

  async function textOf(answer) {
    if (answer.text === undefined) {
      const { word } = await unpack(answer);
      answer.text = Array.from(word, (index) => data.vocabulary.pieces[index]).join("").toLowerCase();
    }
    return answer.text;
  }

  let search = 0;
  async function list() {
    const mine = ++search;
    const folder = Number(at("folder").value), step = at("step").value, order = at("sort").value;
    const wanted = at("search").value.toLowerCase();
    const found = [];
    for (const [index, answer] of data.answers.entries()) {
      const pool = poolOf(answer);
      if (pool.folder !== folder || (step !== "" && String(pool.step) !== step)) continue;
      if (wanted && !data.prompts[answer.prompt].toLowerCase().includes(wanted) && !(await textOf(answer)).includes(wanted)) continue;
      if (mine !== search) return; // something else was asked for meanwhile
      found.push(index);
    }
    const key = order.replace("-", ""), sign = order.startsWith("-") || order === "number" ? 1 : -1;
    const value = (index) => data.answers[index][key] ?? (sign > 0 ? Infinity : -Infinity);
    found.sort((a, b) => sign * (value(a) - value(b)) || a - b);
    listed = found;
    at("found").textContent = found.length
      ? `${number(found.length)} answer${found.length === 1 ? "" : "s"}`
      : `no hits: no prompt and no answer here has “${visible(at("search").value)}”`;
    at("list").hidden = !found.length;
    at("list").replaceChildren(...found.map(entry));
    if (!found.length) clear();
    else if (!found.includes(current?.index)) await show(found[0]);
    else mark();
  }

  const joined = (parts) => parts.filter((part) => part !== null).join(" · ");

  const name = (answer) => joined([`#${answer.number}`, poolOf(answer).step === null ? null : `step ${poolOf(answer).step}`]);

  // A sign as well as a colour: not everyone sees the colours, and paper may have none.
  function verdict(answer) {
    if (answer.score === null) return [];
    const mark = document.createElement("span");
    const above = answer.score > 0;
    mark.className = above ? "above" : "below";
    mark.textContent = `${above ? "✓" : "✗"} score ${answer.score}`;
    return [" · ", mark];
  }

  const size = (answer) => `${number(answer.tokens)} tokens · mean ${answer.entropy.toFixed(3)} nats`;

  function entry(index) {
    const [item, button, length, prompt] = ["li", "button", "small", "small"].map((tag) => document.createElement(tag));
    const answer = data.answers[index];
    length.textContent = size(answer);
    button.type = "button";
    button.dataset.index = index;
    prompt.textContent = visible(data.prompts[answer.prompt].slice(0, 400)).replace(/\s+/g, " ");
    button.append(name(answer), ...verdict(answer), length, prompt);
    item.append(button);
    return item;
  }

  function mark() {
    for (const button of at("list").querySelectorAll("button")) {
      const chosen = Number(button.dataset.index) === current?.index;
      if (chosen) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
      if (chosen) at("list").scrollTop = Math.max(0, button.offsetTop - at("list").offsetTop - 80);
    }
    const place = listed.indexOf(current?.index);
    at("previous").disabled = place <= 0;
    at("next").disabled = place < 0 || place >= listed.length - 1;
  }

  // ---- one answer ---------------------------------------------------------------------------------------------------

  let asked = 0;
  async function show(index) {
    const mine = ++asked;
    const answer = data.answers[index];
    const [columns, tables] = await Promise.all([unpack(answer), tablesOf(poolOf(answer))]);
    if (mine !== asked) return;
    hide();
    current = { index, answer, tables, ...columns, spans: [] };
    const view = document.createDocumentFragment();
    for (let i = 0; i < answer.tokens; i++) {
      const span = document.createElement("span");
      span.className = "token";
      span.dataset.i = i;
      fill(span, data.vocabulary.pieces[columns.word[i]]);
      current.spans.push(span);
      view.append(span);
    }
    at("view").replaceChildren(view);
    at("view").scrollTop = 0;
    fill(at("prompt"), data.prompts[answer.prompt]);
    at("answer-title").replaceChildren(name(answer), ...verdict(answer), " · ", joined([
      size(answer),
      answer.truncated ? "cut off" : null,
      answer.source === null ? null : visible(answer.source),
      answer.truth === null ? null : `expected: ${visible(answer.truth).slice(0, 200)}`,
    ]));
    at("pool-name").textContent = poolOf(answer).step === null ? "of all tokens of the folder in this page" : "of all tokens of its step in this page";
    at("reader").hidden = false;
    mark();
    tint();
    recolour();
  }

  // Nothing was found, so no answer is shown.
  function clear() {
    asked++; // an answer that is being unpacked is not wanted any more
    hide();
    current = null;
    at("reader").hidden = true;
    at("view").replaceChildren();
    at("answer-title").replaceChildren();
  }

  // The score that is chosen: its place among those of the folder, and what is known about it.
  function chosen() {
    const folder = folderOf(current.answer), number = Number(at("by").value);
    const place = folder.scores.indexOf(number);
    return { place, score: data.scores[number], first: current.firsts[place], table: current.tables[place] };
  }

  // The colours of the tokens. The page has the entropy itself; of another score it has between which stops of the slider a token is.
  function tint() {
    if (!current) return;
    const { place, score, first, table } = chosen(), { spans, entropy } = current;
    for (let i = 0; i < spans.length; i++) {
      const value = place === 0 ? entropy[i] * data.unit : table.threshold[first[i] + 1];
      const share = (value - score.low) / (score.full - score.low || 1);
      spans[i].style.setProperty("--h", Math.max(0, Math.min(1, share)).toFixed(3));
    }
    at("legend-start").textContent = signed(String(score.low));
    at("legend-end").textContent = signed(String(score.full)) + unitOf(score);
    at("about").textContent = [score.sentence, folderOf(current.answer).run].filter(Boolean).map(visible).join(" ");
  }

  function recolour() {
    if (!current) return;
    const stop = Number(at("ratio").value), { answer, spans, selected } = current, { place, score, first, table } = chosen();
    const pool = poolOf(answer), mode = at("colour").value;
    let kept = 0, trained = 0;
    for (let i = 0; i < spans.length; i++) {
      const top = first[i] <= stop;
      kept += top;
      trained += selected[i] === SELECTED;
      spans[i].classList.toggle("kept", top);
      spans[i].classList.toggle("shown", mode === "trained" ? selected[i] === SELECTED : top);
    }
    at("view").classList.toggle("only", mode !== "all");
    const ratio = `${Math.round(data.ratios[stop] * 100)}%`;
    at("ratio-value").textContent = ratio;
    at("ratio").setAttribute("aria-valuetext", ratio);
    const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "–");
    const known = selected.some((value) => value <= SELECTED);
    at("counts").textContent =
      `${pool.step === null ? "all shown" : `step ${pool.step}`}: ${number(pool.num_kept[stop])} of ${number(pool.num_tokens)} tokens, ` +
      `τ = ${amount(table.threshold[stop + 1], score)}${unitOf(score)} · this answer: ${number(kept)} of ${number(answer.tokens)} (${share(kept, answer.tokens)})` +
      (known ? ` · selected when written: ${number(trained)} (${share(trained, answer.tokens)})` : "");
    at("colour").querySelector("[value=trained]").disabled = !known;
    const correlation = pool.correlation[place];
    at("agreement").hidden = place === 0;
    at("agreement").textContent =
      `${share(table.shared[stop], pool.num_kept[stop])} of the top ${ratio} by ${visible(score.name)} are in the top ${ratio} by entropy` +
      ` · rank correlation with the entropy: ${correlation === null ? "–" : signed(correlation.toFixed(2))}`;
    if (here >= 0) detail(here);
  }

  // ---- one token ----------------------------------------------------------------------------------------------------

  function detail(i) {
    const { answer, spans, word, entropy, surprise, rank, advantage, selected } = current;
    const { place: column, score, first, table } = chosen();
    const stop = Number(at("ratio").value);
    spans[here]?.classList.remove("here");
    here = i;
    spans[i].classList.add("here");
    const probability = Math.exp(-surprise[i] * data.unit);
    const rows = [
      ["token", `${JSON.stringify(visible(data.vocabulary.pieces[word[i]]).slice(0, 200))} (id ${data.vocabulary.ids[word[i]]})`],
      ["entropy", `${decimal(entropy[i])} nats`],
      ["probability", `${percent(probability)} (log-prob ${surprise[i] ? "−" : ""}${decimal(surprise[i])})`],
      ...(advantage ? [["advantage", signed(decimal(advantage[i]))]] : []),
      ...(column === 0 ? [] : [[visible(score.name), within(table.threshold[first[i] + 1], table.threshold[first[i]], score)]]),
      ["rank", rank[i] === 0 ? "not computed" : rank[i] === 1 ? "0 (the likeliest)" : `${rank[i] - 1} (so many were likelier)`],
      ["position", `${number(i + 1)} of ${number(answer.tokens)}`],
      [`top ${at("ratio-value").textContent}`, first[i] <= stop ? "kept" : "dropped"],
      ["when written", selected[i] === SELECTED ? "kept" : selected[i] === DROPPED ? "dropped" : "not known"],
    ];
    at("info").firstElementChild.replaceChildren(...rows.flatMap(([name, value]) => {
      const term = document.createElement("dt"), text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      return [term, text];
    }));
    at("info").hidden = false;
    place(spans[i].getClientRects()[0] ?? spans[i].getBoundingClientRect());
  }

  function within(low, high, score) {
    const [from, to] = [amount(low, score), amount(high, score)];
    return (from === to ? from : `${from} to ${to}`) + unitOf(score);
  }

  function place(token) {
    const box = at("info").getBoundingClientRect();
    const below = token.bottom + 6 + box.height < innerHeight;
    at("info").style.left = `${Math.max(8, Math.min(token.left, document.documentElement.clientWidth - box.width - 8))}px`;
    at("info").style.top = `${below ? token.bottom + 6 : Math.max(8, token.top - box.height - 6)}px`;
  }

  function hide() {
    current?.spans[here]?.classList.remove("here");
    here = -1;
    at("info").hidden = true;
  }

  const tokenOf = (event) => event.target.closest?.(".token[data-i]");

  at("view").addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    if (token) detail(Number(token.dataset.i));
  });
  at("view").addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token) detail(Number(token.dataset.i));
    else hide();
  });
  at("view").addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") hide();
  });
  at("view").addEventListener("scroll", () => {
    if (here >= 0) place(current.spans[here].getClientRects()[0]);
  });
  at("view").addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!by || !current.spans.length) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(current.spans.length - 1, here + by));
    current.spans[next].scrollIntoView({ block: "nearest" });
    detail(next);
  });
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest?.("#view")) hide();
  });

  // ---- the controls -------------------------------------------------------------------------------------------------

  function choices(select, values) {
    select.replaceChildren(...values.map(([value, name]) => {
      const option = document.createElement("option");
      option.value = value;
      option.textContent = visible(name);
      return option;
    }));
  }

  function steps() {
    const folder = Number(at("folder").value);
    const found = data.pools.filter((pool) => pool.folder === folder && pool.step !== null).map((pool) => String(pool.step));
    choices(at("step"), [["", "all"], ...found.map((step) => [step, step])]);
    at("step-field").hidden = !found.length;
  }

  let picked = null; // the name of the score that the reader chose
  function scores() {
    const folder = data.folders[Number(at("folder").value)];
    choices(at("by"), folder.scores.map((number) => [String(number), data.scores[number].name + (number === folder.own ? " (this run\u2019s)" : "")]));
    at("by").value = folder.scores.find((number) => data.scores[number].name === picked) ?? folder.chosen;
  }

  function move(by) {
    const index = listed[listed.indexOf(current?.index) + by];
    if (index !== undefined) show(index);
  }

  choices(at("folder"), data.folders.map((folder, index) => [String(index), folder.name]));
  at("folder-field").hidden = data.folders.length < 2;
  steps();
  scores();
  at("ratio").max = data.ratios.length - 1;
  at("ratio").value = data.ratios.indexOf(0.2);
  at("folder").addEventListener("change", () => { steps(); scores(); list(); });
  at("by").addEventListener("change", () => {
    picked = data.scores[Number(at("by").value)].name;
    tint();
    recolour();
  });
  for (const id of ["step", "sort"]) at(id).addEventListener("change", list);
  at("search").addEventListener("input", list);
  at("picker").addEventListener("submit", (event) => event.preventDefault());
  at("list").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) show(Number(button.dataset.index));
  });
  at("previous").addEventListener("click", () => move(-1));
  at("next").addEventListener("click", () => move(1));
  at("ratio").addEventListener("input", recolour);
  at("colour").addEventListener("change", recolour);
  list().then(() => { document.documentElement.dataset.ready = "yes"; performance.mark("ready"); });
})();
