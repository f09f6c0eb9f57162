"""The embedded demo: scenes, a tiny LLaVA, a teacher and their evaluation, without a download."""
