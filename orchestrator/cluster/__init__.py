"""The Ray that a run uses, and the machine around it: folders, environment, signals, secrets; nothing of models or rows."""
