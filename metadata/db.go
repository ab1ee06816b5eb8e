package metadata

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"varve.dev/durable"
	"varve.dev/errdefs"
	"varve.dev/layout"
)

// ErrLocked says that another process has the store open.
var ErrLocked = fmt.Errorf("the store is open in another process: %w", errdefs.ErrUnavailable)

// errClosed is the error of whatever comes after Close.
var errClosed = fmt.Errorf("the store is being closed: %w", errdefs.ErrUnavailable)

// DB is the open database of one store. One process at a time has it open.
type DB struct {
	root    *durable.Root
	path    string
	swap    sync.RWMutex // guards which handle it is, and the closing of closing
	h       *handle
	damage  mishap      // something was found damaged
	broken  mishap      // bbolt has panicked
	doubt   atomic.Bool // a commit failed: it may show in the file, and be on no disk
	meta    layout.MetaRecord
	queue   chan *update
	closing chan struct{}
	done    sync.WaitGroup
	closed  sync.Once
	commits commitCounter
	log     *changeLog
	rebuilt *layout.RebuiltRecord

	committing sync.Mutex // held for a commit and its line, and while the log or the file is exchanged
	touched    *touched   // set while the database is compacted; guarded by committing
	compacting sync.Mutex // held by whoever compacts
	noting     sync.Mutex // held while damage is noted, and while the file is exchanged

	trashed  atomic.Int64                    // bytes that were queued for the trash since it was opened
	accounts atomic.Pointer[layout.Accounts] // of the last commit
}

// handle is one file of the database, open in bbolt. Another takes its place when
// the database is compacted.
type handle struct {
	bolt      *bolt.DB
	file      *os.File       // bbolt's own
	committed atomic.Uint64  // the number of its last commit; see notBefore
	users     sync.WaitGroup // transactions under way
}

// enter returns the present handle, which stays open until leave is called.
func (db *DB) enter() (h *handle, leave func()) {
	db.swap.RLock()
	defer db.swap.RUnlock()
	db.h.users.Add(1)
	return db.h, db.h.users.Done
}

// inPlace tells whether a handle is the present one.
func (db *DB) inPlace(h *handle) bool {
	db.swap.RLock()
	defer db.swap.RUnlock()
	return db.h == h
}

// mishap is an error that comes once, and stays.
type mishap struct {
	once sync.Once
	came chan struct{}
	err  error // set when came is closed
}

func newMishap() mishap { return mishap{came: make(chan struct{})} }

func (m *mishap) set(err error) {
	m.once.Do(func() {
		m.err = err
		close(m.came)
	})
}

// get returns nil until the error is set.
func (m *mishap) get() error {
	select {
	case <-m.came:
		return m.err
	default:
		return nil
	}
}

// Options for [Open].
type Options struct {
	// LockTimeout bounds the wait for another process to close the
	// database; zero means do not wait.
	LockTimeout time.Duration
	// Rebuild asks for a new database, made from the change log and what
	// stands on disk, in place of a damaged or missing one. Without it the
	// error is Corrupt.
	Rebuild bool
}

// temporaryDatabase is the name under which a database is made.
const temporaryDatabase = durable.TempPrefix + layout.DatabaseFile

// Open opens the database in root, making it first if the store is new.
// Errors: [ErrLocked]; Corrupt (M1 to M3) for a damaged one;
// ErrFailedPrecondition for a format that this code does not know.
func Open(root *durable.Root, opts Options) (*DB, error) {
	db, err := open(root, opts)
	if !opts.Rebuild || errdefs.AsCorrupt(err) == nil {
		return db, err
	}
	if rerr := rebuild(root, err); rerr != nil {
		return nil, errors.Join(rerr, err)
	}
	if db, err = open(root, opts); err != nil {
		return nil, fmt.Errorf("the database that was rebuilt: %w", err)
	}
	err = db.View(context.Background(), func(tx *Tx) error {
		rec, err := tx.Rebuilt()
		db.rebuilt = &rec
		return err
	})
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// Rebuilt says what became of a database that this Open has rebuilt; nil if
// nothing was wrong with it.
func (db *DB) Rebuilt() *layout.RebuiltRecord { return db.rebuilt }

func open(root *durable.Root, opts Options) (*DB, error) {
	path := root.Path(layout.DatabaseFile)
	b, file, err := (*bolt.DB)(nil), (*os.File)(nil), errMade
	if !made(root) {
		if err := neverMade(root); err != nil {
			return nil, err
		}
		b, file, err = create(root)
	}
	var note suspicion
	if errors.Is(err, errMade) {
		b, file, err = openBolt(path, opts.LockTimeout, func(f *os.File) error {
			note = readSuspicion(root)
			return checkPages(f, note.stands)
		})
	}
	if err != nil {
		return nil, err
	}
	db := &DB{
		root: root, path: path, h: &handle{bolt: b, file: file}, queue: make(chan *update), closing: make(chan struct{}),
		damage: newMishap(), broken: newMishap(),
	}
	if err := db.start(note); err != nil {
		return nil, errors.Join(err, db.shut())
	}
	return db, nil
}

// start makes a database ready that bbolt has open.
func (db *DB) start(note suspicion) error {
	db.h.committed.Store(note.commit)
	if err := db.check(); err != nil {
		return err
	}
	if note.stands { // everything was read, and is well
		if err := db.root.Remove(layout.SuspectFile); err != nil {
			return err
		}
	}
	if stands(db.root, temporaryDatabase) { // of a compaction that was cut off
		if err := db.root.Remove(temporaryDatabase); err != nil {
			return err
		}
	}
	if db.meta.Format != layout.FormatVersion {
		if err := db.migrate(); err != nil {
			return err
		}
	}
	if err := db.openLog(); err != nil {
		return err
	}
	if err := db.loadAccounts(); err != nil {
		return err
	}
	db.done.Go(db.commitLoop)
	db.done.Go(func() { db.watch(db.firstWatch(note.stands)) })
	return nil
}

func (db *DB) loadAccounts() error {
	return db.View(context.Background(), func(tx *Tx) error {
		all, err := tx.Accounts()
		db.accounts.Store(&all)
		return err
	})
}

// Meta returns the store's own record.
func (db *DB) Meta() layout.MetaRecord { return db.meta }

// Accounts returns what the store holds by the last commit, without a
// transaction. The caller must not change it.
func (db *DB) Accounts() layout.Accounts { return *db.accounts.Load() }

// Trashed returns how many bytes were removed since the database was opened.
func (db *DB) Trashed() int64 { return db.trashed.Load() }

// Close waits for updates under way and closes the database. Later updates
// fail with ErrUnavailable; closing again does nothing.
func (db *DB) Close() error {
	var err error
	db.closed.Do(func() {
		db.swap.Lock() // nobody enlists meanwhile
		close(db.closing)
		db.swap.Unlock()
		db.wait()
		err = errors.Join(db.log.close(), db.shut())
	})
	return err
}

// brokenWait bounds the wait for a goroutine that may have met a lock of
// bbolt's that nobody lets go of.
const brokenWait = 2 * time.Second

// wait waits for the goroutines that work for db.
func (db *DB) wait() {
	ended := make(chan struct{})
	go func() {
		db.done.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return
	case <-db.broken.came:
	}
	select {
	case <-ended:
	case <-time.After(brokenWait):
	}
}

// shut closes bbolt. One that has panicked may hold its locks for ever, and
// is only made to let go of the file.
func (db *DB) shut() error {
	if db.broken.get() != nil {
		unlock(db.h.file)
		return nil
	}
	if db.root.Poisoned() != nil {
		return db.shutForgetting()
	}
	return db.h.bolt.Close()
}

// shutForgetting closes bbolt and empties the page cache of its file. A sync
// that failed has left pages there that no disk has and nobody will write; the
// next owner is to see what the disk has.
func (db *DB) shutForgetting() error {
	// The second descriptor keeps the lock meanwhile.
	fd, err := unix.FcntlInt(db.h.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return errors.Join(err, db.h.bolt.Close())
	}
	defer unix.Close(fd)
	return errors.Join(db.h.bolt.Close(), unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED))
}

// View runs fn in a read-only transaction on the last committed state. What
// fn gets from the transaction is its own to keep. Errors: those of fn;
// Corrupt for damage that bbolt or Go ran into; ErrPoisoned after a commit that
// failed, which may show in the file and be on no disk: "it is there already"
// would be an acknowledgement, too.
func (db *DB) View(ctx context.Context, fn func(*Tx) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if db.doubt.Load() {
		return db.root.Poisoned()
	}
	defer faulting()()
	h, leave := db.enter()
	defer leave()
	floor := h.committed.Load()
	return db.suspect(h, db.guard(func() error {
		return h.bolt.View(func(tx *bolt.Tx) error {
			if err := notBefore(tx, floor); err != nil {
				return err
			}
			return protect(func() error { return fn(&Tx{bolt: tx, h: h}) })
		})
	}))
}

// notBefore finds a database that has gone back: bbolt does that without a
// word when the meta page of its last commit is damaged.
func notBefore(tx *bolt.Tx, commit uint64) error {
	if now := uint64(tx.ID()); now < commit {
		return &errdefs.Corrupt{Invariant: "M5", Object: "database", Detail: fmt.Sprintf("it has gone back from commit %d to %d", commit, now)}
	}
	return nil
}

// Damaged returns a channel that closes when something of the open database
// turns out damaged: it should be closed and opened again, which makes it anew.
func (db *DB) Damaged() <-chan struct{} { return db.damage.came }

// Damage says what closed [DB.Damaged]; nil before.
func (db *DB) Damage() error { return db.damage.get() }

// guard runs a whole transaction of bbolt. A panic that comes through it left
// bbolt's locks as they were: nothing is asked of it again, since the next
// call might wait for ever.
func (db *DB) guard(transaction func() error) error {
	if err := db.broken.get(); err != nil {
		return err
	}
	var ran error
	err := protect(func() error {
		ran = transaction()
		return nil
	})
	if err != nil {
		db.broken.set(err)
		return err
	}
	if errors.Is(ran, berrors.ErrDatabaseNotOpen) {
		return errClosed
	}
	return ran
}

// protect turns a panic of fn into its error.
func protect(fn func() error) (err error) {
	defer catch(&err)
	return fn()
}

// catch turns a panic or memory fault from damaged pages into Corrupt. Faults
// of the memory map become panics only in goroutines that asked for it with
// faulting.
//
// A bug in a transaction's own function looks the same and is reported the
// same: bbolt panics with plain text on a bad page, so the two cannot be told
// apart, and a daemon that stays up is worth more than a clean trace. The
// stack is in the finding.
func catch(err *error) {
	if r := recover(); r != nil {
		*err = &errdefs.Corrupt{Invariant: "M1", Object: "database", Detail: fmt.Sprintf("%v\n%s", r, debug.Stack())}
	}
}

// faulting makes memory faults of this goroutine panics until the returned
// function runs.
func faulting() func() {
	old := debug.SetPanicOnFault(true)
	return func() { debug.SetPanicOnFault(old) }
}

// ForCheck returns the open database for package fsck to read, past all types,
// while the store is in use.
func (db *DB) ForCheck() Raw { return Raw{db} }

// Raw reads an open database as bbolt has it.
type Raw struct{ db *DB }

// View runs fn in a read-only transaction of bbolt.
func (r Raw) View(fn func(*bolt.Tx) error) error {
	h, leave := r.db.enter()
	defer leave()
	return h.bolt.View(fn)
}
