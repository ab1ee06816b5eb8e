package layout

// Severity says what a broken invariant costs.
type Severity string

// The severities, worst first.
const (
	Loss   Severity = "loss"   // data that was acknowledged is gone or wrong
	Damage Severity = "damage" // wrong, and can be made right from what is there
	Leak   Severity = "leak"   // space that nothing accounts for
	Notice Severity = "notice" // worth knowing, nothing is wrong
)

// Level says how much a check reads.
type Level string

// The levels; each includes the ones before.
const (
	Quick  Level = "quick"  // the database and the names of directories
	Normal Level = "normal" // sizes, chains, edges, manifests
	Deep   Level = "deep"   // every byte and every attribute
)

// Levels returns them in the order in which each includes the ones before.
func Levels() []Level { return []Level{Quick, Normal, Deep} }

// Cost says what a check of the level reads, and so what its time grows with.
func (l Level) Cost() string {
	switch l {
	case Quick:
		return "the database, once, and the names of directories"
	case Normal:
		return "also the file manifests and the change log"
	case Deep:
		return "also every byte and every attribute of every file"
	}
	return ""
}

// Invariant is a sentence that holds for every store at every moment at which
// no operation is under way, and after recovery from any crash.
type Invariant struct {
	ID       string
	Severity Severity
	Level    Level
	Holds    string // the sentence
	Repair   string // what makes it hold again
}

// Invariants returns the law, in the order in which it is checked.
func Invariants() []Invariant {
	return []Invariant{
		{"M1", Loss, Quick, "Every value in the database carries the CRC-32C of its key and bytes, and decodes.", "rebuild the database from the change log"},
		{"M2", Loss, Quick, "The database has two valid meta pages, and every other page is used once or free; it has every bucket, and a store record whose format is known.", "rebuild the database from the change log"},
		{"M3", Damage, Quick, "Every key parses as what its bucket holds.", "drop the record"},
		{"M4", Damage, Normal, "The change log, with the changes that the database still holds for it, gives the database's records and edges, but for those of operations under way.", "write it anew from the database"},
		{"M5", Loss, Quick, "The sequence of each bucket is the sum of its entries, and the state record has the number of the last commit.", "rebuild the database from the change log"},

		{"B1", Loss, Quick, "A recorded blob stands at blobs/sha256/<first two digits>/<digest> as a regular file.", "make it again from a layer, or fetch it from an origin"},
		{"B2", Loss, Quick, "A recorded blob's file has the recorded size.", "as B1, the bad file to quarantine"},
		{"B3", Loss, Deep, "A recorded blob's bytes have its digest.", "as B1, the bad file to quarantine"},
		{"B4", Leak, Quick, "A file below blobs is named by a record, a sweep or an intent.", "to the trash"},
		{"B5", Damage, Normal, "A blob's file is writable by nobody: it has the mode 0444 and belongs to root.", "set mode and owner"},

		{"L1", Loss, Quick, "A recorded layer stands at layers/<id>/fs as a directory.", "unpack it again from its blob"},
		{"L2", Leak, Quick, "A directory in layers is named by a record, a sweep or an intent, and has nothing in it but the tree.", "to the trash"},
		{"L3", Loss, Normal, "A recorded layer's file manifest is a recorded blob and decodes.", "walk the tree, or unpack it again"},
		{"L4", Loss, Deep, "A layer's tree equals its file manifest: type, mode, owner, time, size, xattrs, link target, hardlinks, device and content of every file; nothing more and nothing less.", "replace the file from the layer's blob or from another layer with the same content"},
		{"L5", Damage, Normal, "A layer key names recorded layers whose records have that key, and every layer with a key is named by it.", "write the index again"},
		{"L6", Damage, Normal, "A layer's recorded size and inodes are those of its file manifest.", "compute them again"},

		{"S1", Loss, Quick, "A snapshot's parent is a recorded committed snapshot, and following parents ends.", "none: the chain is lost below"},
		{"S2", Loss, Quick, "A committed snapshot names a recorded layer.", "unpack the layer again"},
		{"S3", Loss, Quick, "An active snapshot has its directory active/<id> with fs; work, where overlayfs works, is a directory if it is there.", "make them anew, empty: what was written there is lost"},
		{"S4", Notice, Quick, "A directory in active is named by a snapshot, a sweep or an intent, and has nothing in it but fs and work.", "adopt it: it holds users' data and is never garbage"},

		{"I1", Loss, Quick, "An image's target is a recorded blob.", "fetch it from an origin"},
		{"I2", Loss, Normal, "The config and layers of a recorded manifest are recorded blobs or, for layers, unpacked layers; the manifests of an index are recorded or were never fetched.", "fetch them from an origin"},
		{"I3", Damage, Normal, "An image's manifest that was unpacked refers to a snapshot whose chain has its DiffIDs in order.", "drop the reference: it is unpacked again when needed"},

		{"E1", Damage, Quick, "Every edge is stored both child first and parent first.", "write the missing half"},
		{"E2", Loss, Quick, "Both ends of an edge exist.", "make the lost record again, from the change log or from what refers to it; else drop the edge if the parent is gone; if the child is, as its own invariant says"},
		{"E3", Damage, Normal, "The edges are those that the records and manifests call for: none of them is missing, and of a record's own there are no others.", "write the missing edge, drop the other"},
		{"E4", Leak, Normal, "What is not a root has a reference.", "drop it, its files to the trash"},
		{"E5", Damage, Normal, "The edges in uses are those whose parent is in use: it is an image, a container or an API's, or an edge in uses ends at it.", "write them again"},

		{"A1", Damage, Normal, "The accounts in the state record are the sums of the records, and of those of blobs and layers that are not in use.", "add them up again"},

		{"T1", Leak, Quick, "An entry in trash is named by a sweep, or the store is closed and opening it deletes the entry.", "delete it"},
		{"T2", Damage, Quick, "A sweep names the path of what it is for, which no record names.", "drop the sweep"},
		{"G1", Leak, Quick, "staging holds only directories of this boot while the store is open, and nothing when it is closed.", "to the trash, once no record names them"},
		{"G2", Loss, Quick, "No recorded layer stands only in staging.", "rename it into place after a deep check"},
		{"J1", Damage, Quick, "No intent is open when the store is closed.", "open the store: recovery carries it out"},
		{"N1", Damage, Quick, "An ingest holds only data and info, and info decodes.", "drop the ingest: its download starts again"},
		{"C1", Loss, Quick, "A container's record has its directory, with config.json and image.json, which are JSON, and its snapshot.", "none for a lost snapshot; the directory is made from the record"},
		{"C2", Notice, Quick, "A directory in containers is named by a record.", "adopt it: it holds logs and an exit code"},
		{"K1", Damage, Normal, "A cache record's result is a committed snapshot, its alias a cache key that exists or was evicted, and its place by last use is that of the record.", "drop the record: the step runs again"},
		{"R1", Damage, Quick, "The root holds only the names of this format, and the lost+found of a file system.", "none: look what it is"},
		{"R2", Damage, Quick, "The directories of this format, the database and the change log are there as such, not as links, and have its modes and belong to root.", "make a missing directory, set mode and owner; none for what stands in its place"},
	}
}

// FindInvariant returns the invariant with this number.
func FindInvariant(id string) (Invariant, bool) {
	for _, inv := range Invariants() {
		if inv.ID == id {
			return inv, true
		}
	}
	return Invariant{}, false
}
