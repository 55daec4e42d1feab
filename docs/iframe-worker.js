// Search where the site is opened from a disk: a browser starts no worker from a file, so the worker's script runs in a
// hidden frame. A site on a server has real workers, and this does nothing there.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    #frame = document.createElement("iframe");
    #loaded;

    constructor(address) {
      super();
      this.#frame.hidden = true;
      this.#loaded = new Promise((done) => {
        this.#frame.addEventListener("load", () => {
          const inside = this.#frame.contentWindow;
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          const script = inside.document.createElement("script");
          script.addEventListener("load", () => done(inside));
          script.src = new URL(address, location.href).href;
          inside.document.head.append(script);
        }, { once: true });
      });
      document.body.append(this.#frame);
    }

    async postMessage(data) {
      const inside = await this.#loaded;
      inside.dispatchEvent(new inside.MessageEvent("message", { data }));
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
