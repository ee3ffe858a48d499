"""Differential privacy that survives masking: mechanisms, exact integer noise, and what it all adds up to.

`events` says what a release was; `mechanisms` derives it, and the noise of each participant, from a plan; `tables` and
`noise` draw that noise; `accountant` turns events into an (ε, δ); `planning` answers before a run.

Pure, like `maskwork.secagg`: no clock, no disk, no network. Which guarantee a site accepts is its policy's business,
and what it has spent stands in its ledger.
"""
