"""A whole federation on this machine: its processes and its files, for `maskwork demo` and `maskwork bench`.

It is NOT part of any service, and nothing in a service knows it. It never imports the coordinator.
"""
