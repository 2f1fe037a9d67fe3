"""Stubs generated from ``protos/concord/v1``: messages in ``*_pb2``, service stubs in ``*_pb2_grpc``."""
