"""Exit 0 if the MILI process of this container says that it is ready: for Docker's HEALTHCHECK.

The argument names the environment variable that holds the port. Kubernetes asks by itself.
"""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

with grpc.insecure_channel(f"127.0.0.1:{os.environ[sys.argv[1]]}") as channel:
    request = health_pb2.HealthCheckRequest(service="readiness")
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=3)
    except grpc.RpcError as error:
        sys.exit(f"no answer: {error.code().name}")
if answer.status != health_pb2.HealthCheckResponse.SERVING:
    sys.exit("not ready")
