"""Other libraries' own interfaces to attention, one module each; importing one imports its library."""
