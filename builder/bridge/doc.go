// Package bridge lets frontends in other processes use a build: it serves a
// gateway client as BuildKit's LLBBridge service.
//
// Owns nothing on disk. It must not know of solvers or stores: what it serves
// is BuildKit's own interface of a build (frontend/gateway/client), and what it
// serves it as is BuildKit's protocol (frontend/gateway/pb), so that frontends
// made for BuildKit run unmodified, in containers and in clients.
//
// Concurrency: a Bridge answers many calls at once. References that it has
// handed out live as long as it does.
package bridge
