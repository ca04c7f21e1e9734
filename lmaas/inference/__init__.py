"""The path of one request: resolve its model, admit it, lease a slot, deliver the answer, settle the usage. No HTTP of clients here."""
