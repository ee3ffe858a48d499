"""The secure aggregation protocol ``maskwork/v1``, whole and pure.

Everything a second implementation would have to reproduce is in this package and nothing else is: it
consumes messages, time and entropy as arguments and returns new states and effects. It never opens a
socket or a file, reads a clock, draws a random number or writes a log line.

Sources: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017
(section 4 and the active-adversary variant of section 6); Bell et al., "Secure Single-Server Aggregation
with (Poly)Logarithmic Overhead", CCS 2020.
"""
