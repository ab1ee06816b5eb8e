// Package corrupttest damages stores in every way that package corrupt knows,
// and holds the witness to what it has to say of each: that object, under that
// number, and nothing else. It works stores hard, too, and wants to hear
// nothing of those.
//
// Start reading at store_test.go, where the store that is damaged is made, then
// judge_test.go.
//
// It consists of tests only.
package corrupttest
