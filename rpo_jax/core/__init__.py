"""Records, files and errors that everything else stands on."""
