"""From text to token ids, and ids side by side in a microbatch, the response marked."""
