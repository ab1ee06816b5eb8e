package durable

import "sync/atomic"

// OpKind says what an observed change did.
type OpKind uint8

// The kinds of change, in the words of the system calls behind them.
const (
	OpCreate  OpKind = iota + 1 // a regular file came to be, empty
	OpWrite                     // Data was written at Off
	OpResize                    // the file was cut or grown to Off bytes
	OpSync                      // contents and size of a file became durable
	OpMkdir                     // a directory came to be
	OpSymlink                   // Path came to be, pointing to To
	OpLink                      // To came to be, another name of Path
	OpMknod                     // a device node, fifo or socket came to be
	OpSetattr                   // owner, mode, time or an xattr of Path changed
	OpRename                    // Path became To
	OpRemove                    // one name went
	OpSyncDir                   // the names in a directory became durable
	OpBarrier                   // everything below Path became durable, and the names there
)

// Op is one change to the store's files, told after it took place.
type Op struct {
	Kind OpKind
	Path string // relative to the root
	To   string
	Off  int64
	Data []byte // valid during the call only
	// With names what became durable in the same flush as Path: a crash
	// shows all of it or none (OpSyncDir, OpBarrier).
	With []string
}

// Observer is told of every change that goes through a [Root], after it and
// before the method that made it returns. It exists for tests: crashsim
// derives from it what a power cut would leave at that moment.
type Observer interface{ Observe(Op) }

// SetObserver makes o the observer of every later change; nil ends it.
// Tests only: writes are copied for the observer.
func (r *Root) SetObserver(o Observer) {
	if o == nil {
		r.observer.Store(nil)
		return
	}
	r.observer.Store(&o)
}

func (r *Root) observe(op Op) {
	if o := r.observer.Load(); o != nil {
		(*o).Observe(op)
	}
}

var pointHook atomic.Pointer[func(string)]

// At marks a named fault point: a state that can be seen after a crash, named
// in layout's transition tables. It costs one atomic load unless a test has
// set a hook with [OnPoint].
func At(point string) {
	if f := pointHook.Load(); f != nil {
		(*f)(point)
	}
}

// OnPoint makes f run at every fault point in this process; nil ends it.
// Tests only: f may kill the process or panic.
func OnPoint(f func(point string)) {
	if f == nil {
		pointHook.Store(nil)
		return
	}
	pointHook.Store(&f)
}
