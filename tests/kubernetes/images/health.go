// Answers gRPC health checks on a port: `health PORT FILE`. The answer is SERVING while the file exists.
package main

import (
	"context"
	"log"
	"net"
	"os"

	"google.golang.org/grpc"
	health "google.golang.org/grpc/health/grpc_health_v1"
)

type server struct {
	health.UnimplementedHealthServer
	file string
}

func (s server) Check(context.Context, *health.HealthCheckRequest) (*health.HealthCheckResponse, error) {
	status := health.HealthCheckResponse_SERVING
	if _, err := os.Stat(s.file); err != nil {
		status = health.HealthCheckResponse_NOT_SERVING
	}
	return &health.HealthCheckResponse{Status: status}, nil
}

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: health PORT FILE")
	}
	listener, err := net.Listen("tcp", ":"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	checks := grpc.NewServer()
	health.RegisterHealthServer(checks, server{file: os.Args[2]})
	log.Fatal(checks.Serve(listener))
}
