package buildkit

import (
	"context"
	"errors"
	"fmt"

	"github.com/moby/buildkit/client/buildid"
	pb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc"

	"varve.dev/errdefs"
)

// registerGateway serves the gateway service: each call goes to the bridge of
// the build that its metadata names.
func (s *Server) registerGateway(server *grpc.Server) {
	desc := pb.LLBBridge_ServiceDesc
	desc.HandlerType = (*any)(nil)
	desc.Methods = append([]grpc.MethodDesc{}, desc.Methods...)
	for i := range desc.Methods {
		handle := desc.Methods[i].Handler
		desc.Methods[i].Handler = func(_ any, ctx context.Context, decode func(any) error, in grpc.UnaryServerInterceptor) (any, error) {
			b, err := s.bridgeOf(ctx)
			if err != nil {
				return nil, err
			}
			return handle(b, ctx, decode, in)
		}
	}
	desc.Streams = append([]grpc.StreamDesc{}, desc.Streams...)
	for i := range desc.Streams {
		handle := desc.Streams[i].Handler
		desc.Streams[i].Handler = func(_ any, stream grpc.ServerStream) error {
			b, err := s.bridgeOf(stream.Context())
			if err != nil {
				return err
			}
			return handle(b, stream)
		}
	}
	server.RegisterService(&desc, s)
}

func (s *Server) bridgeOf(ctx context.Context) (pb.LLBBridgeServer, error) {
	id := buildid.FromIncomingContext(ctx)
	if id == "" {
		return nil, fmt.Errorf("no buildid found in context: %w", errdefs.ErrInvalidArgument)
	}
	b, err := s.builds.bridge(ctx, id)
	if errors.Is(err, context.Canceled) {
		return nil, fmt.Errorf("no build %s: %w", id, errdefs.ErrNotFound)
	}
	return b, err
}
