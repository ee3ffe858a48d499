"""The participant: dials out, trains on the site's own data, uploads only masked updates."""
