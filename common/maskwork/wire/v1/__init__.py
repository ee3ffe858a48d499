"""Generated from protos/maskwork/wire/v1 by `make protos`. Do not edit."""
