"""``maskwork bench secagg``: the mathematics of a masked round, both sides, without a network."""
