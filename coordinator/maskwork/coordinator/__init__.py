"""The coordinator: opens rounds, adds masked updates, keeps models. It never imports torch."""
