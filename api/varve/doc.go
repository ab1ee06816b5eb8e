// Package varve is varve's own endpoints, under /varve/ on the store's socket:
// the calls that the varve command makes, and that no other API has words for.
//
// Owns nothing on disk. It translates: [Handler] turns requests into calls of
// a [Backend], [Client] is a Backend that makes such requests. So the command
// does not know whether the store is open in its own process or behind a
// socket.
//
// A call is a POST of /varve/v1/<name>. Its body is one line of JSON, the
// request, and then whatever bytes the call takes (a build context, an
// archive). The answer is lines of JSON, each an [Event], a piece of output,
// or at last the result or the error; an answer without one of the last two
// was cut off.
//
// Start reading at backend.go, then wire.go.
package varve
