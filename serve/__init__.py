"""The gRPC service. Imports weakseg only; runs without torch."""
