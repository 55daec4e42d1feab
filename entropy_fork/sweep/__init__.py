"""The jobs of a Hydra sweep, and the Ray cluster that they share."""
