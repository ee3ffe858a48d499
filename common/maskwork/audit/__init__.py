"""The audit trail: what both sides wrote down, chained, signed, and checked afterwards by anybody.

`records` are what is written, `chain` how each record hangs on all before it, `lines` a record as it lies in a file,
`log` the file, `verify` and `against` the checks, `report` what a compliance officer reads.

Nothing in here decides anything about a round, and no secret, share, mask or single update ever enters a record.
"""
