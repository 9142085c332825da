"""What recipes share: raw folders, tables and images, and how a recipe is run."""
