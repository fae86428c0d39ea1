"""Pictures: masks, frames and charts as files for people and other programs."""
