"""The passes: one file each. A pass plans on shapes, then edits one block at a time; passes never import each other."""
