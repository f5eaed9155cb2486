"""The conversation with the model, in messages: pure, standard library only."""
