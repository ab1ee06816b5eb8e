package fsck

import "varve.dev/layout"

var levels = layout.Levels()

// found reports that an object breaks the invariant whose check it was handed
// to. Safe for concurrent use.
type found func(object, path, format string, args ...any)

// checks has one check for each invariant; a test compares the two. When it is
// made, and what a finding costs, is the law's to say.
var checks = map[string]func(*checker, found){
	"M1": func(c *checker, f found) { c.reportDamage("M1", f) },
	"M2": func(c *checker, f found) { c.reportDamage("M2", f) },
	"M3": func(c *checker, f found) { c.reportDamage("M3", f) },
	"M4": (*checker).changeLog,
	"M5": func(c *checker, f found) { c.reportDamage("M5", f) },

	"B1": (*checker).blobStands,
	"B2": (*checker).blobSize,
	"B3": (*checker).blobDigest,
	"B4": (*checker).blobNamed,
	"B5": (*checker).blobMode,

	"L1": (*checker).layerStands,
	"L2": (*checker).layerNamed,
	"L3": (*checker).layerManifest,
	"L4": (*checker).layerTree,
	"L5": (*checker).layerKey,
	"L6": (*checker).layerUsage,

	"S1": (*checker).snapshotParent,
	"S2": (*checker).snapshotLayer,
	"S3": (*checker).activeStands,
	"S4": (*checker).activeNamed,

	"I1": (*checker).imageTarget,
	"I2": (*checker).imageContent,
	"I3": (*checker).imageChain,

	"E1": (*checker).edgeBothWays,
	"E2": (*checker).edgeEnds,
	"E3": (*checker).edgeCalledFor,
	"E4": (*checker).nodeReferred,
	"E5": (*checker).usesWritten,
	"A1": (*checker).accountsAddUp,

	"T1": (*checker).trashNamed,
	"T2": (*checker).sweepPath,
	"G1": (*checker).stagingBoot,
	"G2": (*checker).stagingLayer,
	"J1": (*checker).intentOpen,
	"N1": (*checker).ingestContent,
	"C1": (*checker).containerStands,
	"C2": (*checker).containerNamed,
	"K1": (*checker).cacheRecord,
	"R1": (*checker).rootNames,
	"R2": (*checker).formatStands,
}
