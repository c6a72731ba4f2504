"""One page about runs and what evaluation found of them."""
