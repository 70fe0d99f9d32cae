"""Plain LoRAs against the mixture on the embedded model: `python -m examples.comparison CONFIG -o DIR`."""
