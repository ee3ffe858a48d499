"""``maskwork bench round`` and ``bench scale``: whole rounds between real processes over mutual TLS on loopback.

It starts the commands that a deployment runs, as the demo does, and never imports the coordinator.
"""
