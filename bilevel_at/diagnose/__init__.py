"""Why a figure is what it is: measurements of a network, of its training, and of the attacks on it."""
