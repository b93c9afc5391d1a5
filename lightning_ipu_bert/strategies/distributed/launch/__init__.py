"""How ranks are started and watched, and how signals reach them."""
