"""The gRPC edge: the only room that sees protobuf messages. It validates, translates and delegates."""
