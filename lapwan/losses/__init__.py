"""Losses on plain tensors: flow matching (`flow`), how sigma is drawn and weighted (`sigmas`), the router's losses
(`routing`), preference alignment (`preference`)."""
