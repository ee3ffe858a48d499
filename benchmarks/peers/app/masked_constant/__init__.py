"""A Flower App without training: a constant comes back from every participant, masked or plain."""
