"""From rows to token ids and loss masks: sources, templates, tokenizers; nothing of models or scores."""
