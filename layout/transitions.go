package layout

// Direction is what recovery does with a state it finds.
type Direction string

// The directions.
const (
	Forward Direction = "forward" // the operation is finished
	Back    Direction = "back"    // what is there is thrown away
	Resume  Direction = "resume"  // it is kept for the next try
	Stay    Direction = "stay"    // it is complete already
)

// Transition is a state on disk that can be seen after a crash.
type Transition struct {
	ID        string
	Operation string
	// Seen is what database and directories look like.
	Seen      string
	Direction Direction
	// Recovery says what is done about it.
	Recovery string
	// Point is the fault point at which a writer is stopped in this state.
	Point string
}

// The fault points, each the Point of one transition.
const (
	PointIngestOpened  = "ingest.opened"
	PointIngestPartial = "ingest.partial"
	PointIngestWhole   = "ingest.whole"

	PointTreePartial = "tree.partial"
	PointTreeWhole   = "tree.whole"

	PointPublishDurable  = "publish.durable"
	PointPublishIntended = "publish.intended"
	PointPublishBlob     = "publish.blob-renamed"
	PointPublishLayer    = "publish.layer-renamed"
	PointPublishRenamed  = "publish.renamed"
	PointPublishSynced   = "publish.synced"
	PointPublishRecorded = "publish.recorded"

	PointActiveMade     = "active.made"
	PointActiveRecorded = "active.recorded"

	PointContainerMade = "container.made"

	PointCacheMountBegun   = "cachemount.begun"
	PointCacheMountClaimed = "cachemount.claimed"

	PointFenceTaken   = "fence.taken"
	PointFenceTrashed = "fence.trashed"

	PointRepairMade  = "repair.made"
	PointRepairGiven = "repair.given"

	PointSweepRecorded = "sweep.recorded"
	PointSweepClaimed  = "sweep.claimed"
	PointSweepTrashed  = "sweep.trashed"
	PointSweepDeleted  = "sweep.deleted"

	PointCompactMade      = "compact.made"
	PointCompactPublished = "compact.published"

	PointCreateDirs      = "create.dirs"
	PointCreateDatabase  = "create.database"
	PointCreatePublished = "create.published"
)

// Transitions is the one table of states between "not begun" and "done", for
// every operation that touches both the database and the files. Recovery is
// written beside it (package journal) and the crash tests assert that every
// point has fired.
func Transitions() []Transition {
	return []Transition{
		{"T-C1", "create", "directories, no database", Forward, "creation goes on; every step may be repeated", PointCreateDirs},
		{"T-C2", "create", "directories, a database under its temporary name", Back, "the temporary database is removed and made again", PointCreateDatabase},
		{"T-C3", "create", "the database under its name", Stay, "none", PointCreatePublished},

		{"T-Z1", "compact", "the database, and what it holds once more under the temporary name", Back, "the one under the temporary name is removed", PointCompactMade},
		{"T-Z2", "compact", "the database, written anew", Stay, "none", PointCompactPublished},

		{"T-N1", "ingest", "ingest/<id> that nobody can go on with: without info or data, with a torn info, or private", Back, "it is removed", PointIngestOpened},
		{"T-N2", "ingest", "ingest/<id> with some of the data", Resume, "the next writer hashes what is there and goes on behind it; if the blob has come another way it is removed", PointIngestPartial},
		{"T-N3", "ingest", "ingest/<id> with all of the data, verified, no intent", Resume, "as T-N2; nothing is left to fetch", PointIngestWhole},

		{"T-U1", "unpack", "staging/<boot>/<id> incomplete, no intent", Back, "to the trash", PointTreePartial},
		{"T-U2", "unpack", "staging/<boot>/<id> complete, not durable, no intent", Back, "to the trash", PointTreeWhole},

		{"T-P1", "publish", "contents durable, no intent", Back, "staging goes to the trash, ingests resume", PointPublishDurable},
		{"T-P2", "publish", "an intent, nothing renamed", Forward, "every rename is made, the names synced, the records written, the intent dropped", PointPublishIntended},
		{"T-P3", "publish", "an intent, some blobs renamed", Forward, "as T-P2 for the rest", PointPublishBlob},
		{"T-P4", "publish", "an intent, some layers renamed", Forward, "as T-P2 for the rest", PointPublishLayer},
		{"T-P5", "publish", "an intent, all renamed, names perhaps not durable", Forward, "as T-P2: what went back to its old name is renamed again", PointPublishRenamed},
		{"T-P6", "publish", "an intent, all renamed and durable", Forward, "the records are written, the intent dropped", PointPublishSynced},
		{"T-P7", "publish", "records, no intent", Stay, "the operation may be acknowledged", PointPublishRecorded},

		{"T-A1", "prepare", "active/<id> without a record, its tree empty", Back, "it is removed; one whose tree holds anything is adopted, not removed", PointActiveMade},
		{"T-A2", "prepare", "record and directory", Stay, "none", PointActiveRecorded},

		{"T-K1", "container", "containers/<id> without a record, held by a lease", Back, "it goes with the lease; one that no lease holds is adopted", PointContainerMade},

		{"T-M1", "cache mount", "cachemounts/<key>.new, what it begins with not all copied", Back, "it is removed", PointCacheMountBegun},

		{"T-M2", "cache mount removal", "a claimed sweep of a cache mount, which stands where it stood", Forward, "recovery moves it to the trash before anybody uses its name", PointCacheMountClaimed},

		{"T-Q1", "repair", "quarantine/<id> with good files that have no names in the layer yet", Stay, "none: the next check finds what is still bad", PointRepairMade},
		{"T-Q2", "repair", "quarantine/<id> with what was bad, the good files in its place, directories' times perhaps not set", Stay, "none: the next check finds a wrong time", PointRepairGiven},

		{"T-R1", "remove", "a sweep, the files where they stood", Forward, "the sweep is claimed and the files renamed to the trash, unless a record or intent names them again", PointSweepRecorded},
		{"T-R2", "remove", "a claimed sweep, the files where they stood", Forward, "the files are renamed to the trash", PointSweepClaimed},
		{"T-R3", "remove", "a claimed sweep, the files in the trash", Forward, "they are deleted", PointSweepTrashed},
		{"T-R4", "remove", "a claimed sweep, no files", Forward, "the sweep is dropped", PointSweepDeleted},

		{"T-F1", "fence", "an intent for a blob whose name still has the file of a record that was removed, no sweep of it", Forward, "as T-P2; the file that has the name stays if it has the size", PointFenceTaken},
		{"T-F2", "fence", "an intent for a blob or its record, a claimed sweep of trash/<id>, which has the file that the blob's name had before", Forward, "as T-P2; the sweep is of what is in the trash alone", PointFenceTrashed},
	}
}
