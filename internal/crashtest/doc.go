// Package crashtest interrupts a whole store at work, and looks at what is
// left: after a kill at every fault point, after a power cut at every k-th
// change in a simulation, after power cuts of real file systems, and after each
// change to its files that fails.
//
// There is one workload (work_test.go), which pulls, tags, builds and removes
// images; one judgement of the aftermath (aftermath_test.go), by a ledger of
// what was acknowledged, a hash of each layer that shares no code with varve,
// and the witness; and the instruments: kill_test.go, simulate_test.go,
// powercut_test.go, faults_test.go.
//
// Varve's own commands are killed on stores that live on: commands_test.go is
// the campaign, repertoire_test.go what is run, settings_test.go how,
// told_test.go the ledger, closed_test.go and accounts_test.go what must not be
// left. cancel_test.go calls operations off, recovery_test.go counts what a
// recovery does. longbuild_test.go has builds of many steps, which killbuild_test.go
// and powerbuild_test.go cut and make again: what was told to be over is known.
// Package snapshotter has the same below images, in one process.
//
// It consists of tests only.
package crashtest
