"""Episodes: the protocol advanced over a backend, in token ids."""
