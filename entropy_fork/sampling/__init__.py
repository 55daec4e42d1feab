"""How answers are drawn: seeded draws, two temperatures, the generation loop on transformers, vLLM's processor."""
