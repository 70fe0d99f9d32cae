"""lapwan: fine-tune, specialise, align and diagnose Wan2.2 video models."""

__version__ = "0.1.0"
