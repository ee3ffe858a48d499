"""Tasks that come ready-made. A site's own tasks live in the site's own package."""
