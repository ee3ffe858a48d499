"""``maskwork demo``: a whole federation on this machine, with two participants killed on the way.

It starts the same commands that a deployment runs (``maskwork coordinator run``, ``maskwork participant run``), each in
a process of its own with certificates of its own, submits a job as a researcher would, kills two participants at
observed protocol events, and holds the model against the same training without any masking.

It is NOT part of any service, and nothing in a service knows it. It never imports the coordinator.
"""
