// Package crashsim shows what a power cut could leave of a store, at every
// k-th change to its files, from one run of a workload. For tests only.
//
// [Attach] makes a [Sim] the durable.Observer of a root. From then on it keeps,
// in memory, every file twice: as the running system sees it, and as far as it
// is durable. [Sim.Every] calls a function after every k-th change, with the
// workload stopped, and [Moment.Image] writes one possible aftermath into a
// fresh directory, where the function recovers it and checks it.
//
// What is durable is told by the operations that made it so, as pessimistic as
// a journaled file system lets one be:
//
//   - A sync of a file makes its contents, size and attributes durable, not
//     its name.
//   - A sync of a directory makes the names in it durable, and the attributes
//     of the directory; a new file behind such a name is there, empty.
//   - A barrier makes everything below its names durable, and the way there.
//     Real barriers make more durable (the whole journal); no code may count
//     on that.
//   - A rename is one transaction while neither directory was synced: the old
//     name or the new. If only the new one's directory was synced, a file may
//     have both names; a directory has one place, the new. If only the old
//     one's was synced, the file may be gone: ext4 and xfs keep it, POSIX does
//     not say so, and a forgotten sync should be seen.
//   - One flush that covers several directories is one operation.
//
// Of what is not durable [None] keeps nothing, [All] everything, and [Some] a
// subset by chance: names in any order that leaves each name's own history a
// prefix; contents block by block at 4 KiB, with zeros where a block is missing
// and the size from before or after.
//
// The database is no business of this package: it is copied as of its last
// commit by a function of the caller's, since its own atomicity is proven at
// block level by the power-cut rig.
//
// It must not know the format of a store. Limits: what reaches the files past
// package durable (a container's writes) is seen when a barrier covers it;
// names that lead through symbolic links, likewise. Two changes by two
// goroutines are told in either order, so a sync that runs beside a rename may
// be taken for one that came after it.
//
// Start reading at sim.go, then names.go, then image.go.
package crashsim
