"""safetensors files as bytes: header and reads (`container`), merging rewrite (`rewrite`), `fingerprints`, and the key
layouts of other tools: Wan's modules (`wan_keys`), LoRA keys and adapters that are not supported (`lora_keys`)."""
