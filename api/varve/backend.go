package varve

import (
	"context"
	"encoding/json"
	"io"
	"time"
)

// Backend is what the command needs of a store. Errors are of the kinds of
// package errdefs, on both sides of a socket.
type Backend interface {
	Images
	Containers
	Space

	// Root is the store's directory.
	Root(ctx context.Context) (string, error)
	Info(ctx context.Context) (Info, error)
	// Fsck checks the store while it is in use, and repairs it if asked to.
	Fsck(ctx context.Context, req FsckRequest, progress func(Event)) (FsckReport, error)
	// Quarantine lists what repairs took out of the store for being damaged,
	// the oldest first; Discard deletes some of it, by id.
	Quarantine(ctx context.Context) ([]Quarantined, error)
	Discard(ctx context.Context, ids []string) error
}

// Images is what can be done with images. progress may be nil; it is called
// from one goroutine at a time and must not block for long.
type Images interface {
	Pull(ctx context.Context, req PullRequest, progress func(Event)) (ImageSummary, error)
	Push(ctx context.Context, req PushRequest, progress func(Event)) (PushResult, error)
	// Load reads an OCI layout or a docker archive, as a tar stream.
	Load(ctx context.Context, archive io.Reader, progress func(Event)) ([]ImageSummary, error)
	// Save writes a tar stream of the images named.
	Save(ctx context.Context, req SaveRequest, w io.Writer) error
	Tag(ctx context.Context, req TagRequest) error
	List(ctx context.Context) ([]ImageSummary, error)
	Remove(ctx context.Context, req RemoveRequest) (RemoveResult, error)
	// Inspect returns the image in docker's JSON.
	Inspect(ctx context.Context, name string) (json.RawMessage, error)
	History(ctx context.Context, name string) ([]HistoryEntry, error)
}

// Containers makes and removes what a shim runs.
type Containers interface {
	Create(ctx context.Context, req CreateRequest, progress func(Event)) (Container, error)
	// Commit makes an image of what a container that does not run has
	// written. The container stays.
	Commit(ctx context.Context, req CommitRequest) (ImageSummary, error)
	// RemoveContainer removes a container that is not running.
	RemoveContainer(ctx context.Context, id string) error
}

// Event tells how far something has come. Events with one ID belong together;
// a later one replaces an earlier one, but for Log, which adds up.
type Event struct {
	ID      string `json:"id"`
	Name    string `json:"name,omitempty"` // for people
	Phase   Phase  `json:"phase"`
	Current int64  `json:"current,omitempty"` // bytes
	Total   int64  `json:"total,omitempty"`   // bytes; 0 if unknown
	Log     []byte `json:"log,omitempty"`     // output of a build step
	Text    string `json:"text,omitempty"`    // a warning, or why it failed
}

// Phase is where something stands.
type Phase string

// The phases.
const (
	Waiting     Phase = "waiting"
	Resolving   Phase = "resolving"
	Downloading Phase = "downloading"
	Unpacking   Phase = "unpacking"
	Uploading   Phase = "uploading"
	Running     Phase = "running"
	Checking    Phase = "checking"
	Exists      Phase = "exists" // was there already
	Cached      Phase = "cached" // a build step that did not have to run
	Done        Phase = "done"
	Failed      Phase = "failed"
	Warning     Phase = "warning"
)

// Registry says how to talk to the registry of a reference.
type Registry struct {
	PlainHTTP bool `json:"plainHTTP,omitempty"` // for the registry of the reference
	// PlainHTTPHosts are further registries to speak HTTP with: those of
	// a Dockerfile's FROM, for example.
	PlainHTTPHosts []string `json:"plainHTTPHosts,omitempty"`
	HostsDir       string   `json:"hostsDir,omitempty"` // folder of <host>/hosts.toml
	Auth           *Auth    `json:"auth,omitempty"`     // nil: the docker config file of whoever has the store open
}

// RegistryOption is the frontend option of a build that holds a [Registry] in
// JSON, for want of a place in BuildKit's request. Frontends do not see it.
const RegistryOption = "varve.registry"

// Auth is a user's credentials for one registry.
type Auth struct {
	Username      string `json:"username,omitempty"`
	Password      string `json:"password,omitempty"`
	IdentityToken string `json:"identityToken,omitempty"`
}

// PullRequest asks for an image.
type PullRequest struct {
	Reference string `json:"reference"`
	Platform  string `json:"platform,omitempty"` // "linux/arm64"; empty: this host's
	Registry
}

// PushRequest asks to send an image to the registry of its name.
type PushRequest struct {
	Reference string `json:"reference"`
	Registry
}

// PushResult says what the registry has now.
type PushResult struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// SaveRequest asks for an archive of images: docker's, which is an OCI layout
// at once.
type SaveRequest struct {
	Names []string `json:"names"`
}

// TagRequest gives an image another name.
type TagRequest struct {
	Source string `json:"source"`
	Target string `json:"target"`
}

// RemoveRequest removes a name, or an image with all its names by its id.
type RemoveRequest struct {
	Name  string `json:"name"`
	Force bool   `json:"force,omitempty"` // several names for one id
}

// RemoveResult says what went.
type RemoveResult struct {
	Untagged []string `json:"untagged,omitempty"`
	Deleted  []string `json:"deleted,omitempty"`
}

// ImageSummary is a line of `varve images`.
type ImageSummary struct {
	Name     string    `json:"name"`   // "<none>" for an image without one
	ID       string    `json:"id"`     // digest of the config
	Digest   string    `json:"digest"` // of the manifest or index that the name points to
	Platform string    `json:"platform,omitempty"`
	Created  time.Time `json:"created"`
	Size     int64     `json:"size"` // bytes of its layers on disk
}

// HistoryEntry is a line of `varve history`.
type HistoryEntry struct {
	Created   time.Time `json:"created"`
	CreatedBy string    `json:"createdBy"`
	Size      int64     `json:"size"` // bytes; 0 for a step without a layer
	Comment   string    `json:"comment,omitempty"`
}

// CreateRequest asks for a container.
type CreateRequest struct {
	Image      string   `json:"image"`
	Command    []string `json:"command,omitempty"`
	Entrypoint []string `json:"entrypoint,omitempty"` // nil: the image's
	Env        []string `json:"env,omitempty"`
	Volumes    []string `json:"volumes,omitempty"` // HOST:CONTAINER[:ro], absolute
	WorkingDir string   `json:"workingDir,omitempty"`
	User       string   `json:"user,omitempty"`
	Name       string   `json:"name,omitempty"`
	Hostname   string   `json:"hostname,omitempty"`
	Network    string   `json:"network,omitempty"` // "host" or "none"
	Terminal   bool     `json:"terminal,omitempty"`
	Stdin      bool     `json:"stdin,omitempty"`
	ReadOnly   bool     `json:"readOnly,omitempty"`
	Privileged bool     `json:"privileged,omitempty"`
	CapAdd     []string `json:"capAdd,omitempty"`
	CapDrop    []string `json:"capDrop,omitempty"`
	Memory     int64    `json:"memory,omitempty"` // bytes; 0: no limit
	NanoCPUs   int64    `json:"nanoCPUs,omitempty"`
	PidsLimit  int64    `json:"pidsLimit,omitempty"`
	Pull       string   `json:"pull,omitempty"` // "missing" (default), "always", "never"
	Platform   string   `json:"platform,omitempty"`
	Registry
}

// Container is ready to be started by its shim.
type Container struct {
	ID string `json:"id"`
	// Dir is the container's directory, which the shim is given. It is on
	// the host that has the store open.
	Dir string `json:"dir"`
}

// CommitRequest asks for an image of a container.
type CommitRequest struct {
	Container string `json:"container"`        // its name, its id or the beginning of it
	Name      string `json:"name,omitempty"`   // of the image; empty: none
	Author    string `json:"author,omitempty"` // goes into its history
	Message   string `json:"message,omitempty"`
}

// FsckRequest asks for a check.
type FsckRequest struct {
	Level string `json:"level"`
	// Of chooses images, containers, layers or blobs, by name or id; nothing
	// stands for the whole store.
	Of []string `json:"of,omitempty"`
	// Sample is the share of all contents that a deep check reads; 0: all.
	Sample float64 `json:"sample,omitempty"`
	// Resume has a deep check that was cut off go on; if none was, one begins.
	Resume bool `json:"resume,omitempty"`
	// Repair carries a plan out for what was found and checks again. Plan
	// makes the plan and carries nothing out.
	Repair bool `json:"repair,omitempty"`
	Plan   bool `json:"plan,omitempty"`
	// Rate is how many bytes a second a deep check reads at most; 0: no limit.
	Rate int64 `json:"rate,omitempty"`
	// Registry says how to talk to the registries that blobs came from.
	Registry
}

// FsckReport is the report of package fsck, in its documented JSON, and the
// exit code that goes with it.
type FsckReport struct {
	Report json.RawMessage `json:"report"`
	// Plan is that of package repair, with what came of it; nothing if none
	// was asked for.
	Plan     json.RawMessage `json:"plan,omitempty"`
	Text     string          `json:"text"`
	ExitCode int             `json:"exitCode"`
}

// Quarantined is what one repair took out of the store.
type Quarantined struct {
	ID     string    `json:"id"`
	When   time.Time `json:"when"`
	Object string    `json:"object"` // that was repaired, as findings call it
	Found  []string  `json:"found"`  // the findings
	Images []string  `json:"images"` // that stood on it
	Bytes  int64     `json:"bytes"`  // on the disk
}

// Check tells of a deep check.
type Check struct {
	Started    time.Time `json:"started"`
	Finished   time.Time `json:"finished,omitzero"`
	Of         []string  `json:"of,omitempty"`
	Sample     float64   `json:"sample,omitempty"`
	Background bool      `json:"background,omitempty"` // the daemon's own
	Bytes      int64     `json:"bytes"`                // read
	Findings   int       `json:"findings"`             // but for notices
	Losses     int       `json:"losses"`               // of them
	Healed     int       `json:"healed"`               // of them, then
}

// Info describes the store and whoever has it open.
type Info struct {
	Version  string `json:"version"`
	Root     string `json:"root"`
	StoreID  string `json:"storeID"`
	Format   int    `json:"format"`
	Embedded bool   `json:"embedded"` // open in a command, not in a daemon
	PID      int    `json:"pid"`
	Images   int    `json:"images"`
	Layers   int    `json:"layers"`
	Blobs    int    `json:"blobs"`
	// Checked is the last deep check of the whole store that came to its end.
	Checked *Check `json:"checked,omitempty"`
	// Checking are deep checks that did not, yet or because they were cut off.
	Checking []Check `json:"checking,omitempty"`
	Kernel   string  `json:"kernel"`
	FileSys  string  `json:"fileSystem"`
	// Recovered is what opening the store found unfinished.
	Recovered []string `json:"recovered,omitempty"`
}
