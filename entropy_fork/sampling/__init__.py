"""How answers are drawn: seeded draws, two temperatures, the loop on transformers, and vLLM's processor."""
