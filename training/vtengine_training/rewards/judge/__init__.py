"""A language model as judge of answers: any OpenAI-compatible endpoint. Every input is taken for hostile."""
