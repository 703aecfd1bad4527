"""The stages that change weights, and the data they train on."""
